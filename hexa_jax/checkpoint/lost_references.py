"""Keep what tensorstore leaks from growing with every save and restore.

Its `JsonToPyObject` (python/tensorstore/json_type_caster.cc, 0.1.86) never releases its references
to the keys and values of a dictionary, so that those of every dictionary it returns live for ever.
Orbax asks for two kinds: the specification of the folder, once for each array, and counters, twice
a save, for a log line and telemetry that nobody here reads.
"""

import collections
import copy
import sys
from typing import Any

import tensorstore as ts

_to_json = ts.KvStore.Spec.to_json
# (specification, include_defaults, answer); a save uses two
_asked: collections.deque = collections.deque(maxlen=8)


def _leaks() -> bool:
    """Return whether a value that tensorstore returns has one reference too many."""
    spec = ts.KvStore.Spec({"driver": "file", "path": "/folder/"})
    return sys.getrefcount(_to_json(spec)["path"]) > sys.getrefcount(
        {"path": "/".join(("", "folder", ""))}["path"]
    )


def _to_json_once(self: ts.KvStore.Spec, include_defaults: bool = False) -> Any:
    """Return a copy of the answer kept for an equal specification, or ask tensorstore."""
    # other threads append; specifications cannot be hashed
    for spec, defaults, answer in _asked.copy():
        if spec == self and defaults == include_defaults:
            return copy.deepcopy(answer)
    answer = _to_json(self, include_defaults)
    _asked.append((self, include_defaults, copy.deepcopy(answer)))
    return answer


def mend() -> None:
    """Make tensorstore convert a specification once, and report no counters, if it leaks."""
    if _leaks():
        ts.KvStore.Spec.to_json = _to_json_once  # type: ignore[method-assign]
        ts.experimental_collect_matching_metrics = lambda *arguments, **options: []
