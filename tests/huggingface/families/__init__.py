# SPDX-License-Identifier: Apache-2.0
"""Every causal family of transformers, made tiny: patched beside stock. ``python -m tests.huggingface.families``.

:mod:`.tiny` makes the models, :mod:`.runs` has what stock and patched models compute, :mod:`.sweep` compares them,
:mod:`.records` keeps and shows what came out.
"""
