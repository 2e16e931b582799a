# SPDX-License-Identifier: Apache-2.0
"""Every causal family of transformers, made tiny: patched beside stock. ``python -m tests.huggingface.families``.

:mod:`.tiny` makes the models, :mod:`.runs` has single calls of stock and patched models, :mod:`.trials` compares
them, :mod:`.cells` says what to put before a model, :mod:`.sweep` runs a family, :mod:`.records` keeps and shows what
came out.
"""
