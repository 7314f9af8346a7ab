"""What a protection is: methods, gradient graphs, bundles, quality; shared by both sides."""
