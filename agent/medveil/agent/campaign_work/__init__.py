"""A site's part in campaigns: what was offered, what the steward answered, and how far the work is.

book        the site's own record of campaigns (SQLite); what every part below reads and writes
bundles     received parts become a file that is trusted, or nothing
orders      what a message of the coordinator does here
worker      one campaign's job over the site's images, as a process of its own
reporting   answers, beats and reports to the coordinator, through the one door
standing    how everything stands, as one value for screen and JSON
run         all of it together, until Ctrl-C
"""
