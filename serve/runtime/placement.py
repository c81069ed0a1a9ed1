"""Which of a graph's nodes run on which execution provider."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# onnxruntime keeps the assignment only where this entry is set. It costs 1 to 3 % of the load (1.7 ms of 51
# for 5000 nodes), reading it 1.1 µs a node, and nothing once the graph runs.
RECORDING = "session.record_ep_graph_assignment_info"

_MOST_OPERATORS = 5


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a graph's nodes run.

    Attributes:
        providers: the session's execution providers, most wanted first.
        operators: provider to operator type to how many nodes of it, as the graph was when onnxruntime
            divided it among the providers; None on older onnxruntime releases, which don't tell.
    """

    providers: tuple[str, ...]
    operators: Mapping[str, Mapping[str, int]] | None = None

    @property
    def nodes(self) -> dict[str, int]:
        """Provider to how many nodes it runs, 0 too; empty where onnxruntime doesn't tell."""
        if self.operators is None:
            return {}
        return {provider: sum(self.operators.get(provider, {}).values()) for provider in self.providers}

    def properties(self) -> dict[str, str]:
        """What ModelMetadata says of it: `execution_providers`, and `nodes.PROVIDER` for each."""
        counts = {f"nodes.{provider}": str(count) for provider, count in self.nodes.items()}
        return {"execution_providers": ",".join(self.providers), **counts}

    def __str__(self) -> str:
        """For the log: what runs where, with the operators of each provider but the first."""
        if self.operators is None:
            return f"{', '.join(self.providers)} (this onnxruntime doesn't tell which nodes run where)"
        parts = []
        for provider, count in self.nodes.items():
            text = f"{count} {'node' if count == 1 else 'nodes'} on {provider}"
            rest = provider != self.providers[0] and count
            parts.append(f"{text} ({self.most_frequent(provider)})" if rest else text)
        return ", ".join(parts)

    def most_frequent(self, provider: str) -> str:
        """The operators that this provider runs most of, such as `3 Shape, 1 Gather`."""
        counts = Counter((self.operators or {}).get(provider, {})).most_common()
        shown = [f"{count} {operator}" for operator, count in counts[:_MOST_OPERATORS]]
        return ", ".join(shown) + (", …" if len(counts) > _MOST_OPERATORS else "")


def read_placement(session: Any) -> Placement:
    """The placement of an onnxruntime.InferenceSession that was made with the entry RECORDING."""
    providers = tuple(session.get_providers())
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(providers)
    operators: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        counts = operators.setdefault(subgraph.ep_name, Counter())
        counts.update(node.op_type for node in subgraph.get_nodes())
    return Placement(providers, operators)
