# SPDX-License-Identifier: Apache-2.0
"""Files and connectors by which other programs use prefixes, cartridges and soft prompts."""
