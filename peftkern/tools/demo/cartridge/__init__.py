# SPDX-License-Identifier: Apache-2.0
"""``peftkern demo --method cartridge``: a cartridge of a document, by self-study (:mod:`peftkern.self_study`)."""
