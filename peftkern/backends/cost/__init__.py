# SPDX-License-Identifier: Apache-2.0
"""How long a call takes: the model that ``"auto"`` chooses by."""
