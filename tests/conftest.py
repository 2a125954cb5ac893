"""Shape checks on every public tensor function, and one thread a process."""

from jaxtyping import install_import_hook

with install_import_hook(["rlkl.kl", "rlkl.credit", "rlkl.losses", "rlkl.exact"], "beartype.beartype"):
    import rlkl.credit
    import rlkl.exact
    import rlkl.kl
    import rlkl.losses  # noqa: F401

import torch

torch.set_num_threads(1)
