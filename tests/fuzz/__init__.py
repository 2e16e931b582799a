# SPDX-License-Identifier: Apache-2.0
"""Random calls of the CPU kernels in guarded memory, on every instruction set, against fp64.

``python -m tests.fuzz --minutes 5 --seed 1`` runs a campaign. Case ``1:17`` is the 17th of seed 1, on every machine
the same. :mod:`.cases` draws it, :mod:`.guards` places its tensors next to pages that nobody may touch,
:mod:`.worker` runs it in a process that may crash, and :mod:`.campaign` counts, and repeats first what failed before.
"""
