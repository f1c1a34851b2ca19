"""Drawings and names of the concepts; see ``NOTICE.md`` for their authors and licences."""
