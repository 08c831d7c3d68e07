"""BlockProp's figures 2 and 3."""
