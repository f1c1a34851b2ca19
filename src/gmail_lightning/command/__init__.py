"""The command ``gmail-lightning``: its verbs, run folders, and advice where it is used wrongly."""
