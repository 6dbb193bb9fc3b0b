"""The network, its losses, and the user state it leaves behind."""
