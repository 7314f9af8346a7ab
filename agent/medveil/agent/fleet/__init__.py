"""The site's side of Flower: the gate that the hospital owns, the programs behind it, and what they may do.

node_key      who this site is to Flower; made here, never leaves
passage       which requests may pass the gate, and what of them (pure)
gate          the only way from the SuperNode to the coordinator
programs      SuperNode and SuperExec as command lines
client_app    what the coordinator's short messages do here
"""
