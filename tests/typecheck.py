"""How annotations are checked while the tests run: an int may stand where a float is asked for (PEP
484).
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
