"""Where to cut a network: what layers cost, what each method does with them, and the cuts that balance the stages."""
