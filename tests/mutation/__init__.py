# SPDX-License-Identifier: Apache-2.0
"""Plants single faults in the Python layer and counts those that the fast tests catch.

``python -m tests.mutation --seed 0 --count 100`` runs a sample. :mod:`.mutants` lists the faults that can be planted,
:mod:`.lines` records which test executes which lines, and :mod:`.processes` runs tests on a mutated copy of the
checkout in forked processes.
"""
