"""Get raw media, and account for every clip: the manifest and the ledger."""
