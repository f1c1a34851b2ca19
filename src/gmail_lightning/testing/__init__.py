"""What a class of one's own must hold to be used like ours: each check names every fault, and what to do about it.

Call them in the tests of your package, with tiny weights. They raise one ``AssertionError`` that lists all faults, as
scikit-learn's ``check_estimator`` does it for estimators.
"""

from gmail_lightning.testing.branches import check_branch
from gmail_lightning.testing.datasets import check_dataset
from gmail_lightning.testing.encoders import check_encoder
from gmail_lightning.testing.generation import check_captioner, check_generator

__all__ = ["check_branch", "check_captioner", "check_dataset", "check_encoder", "check_generator"]
