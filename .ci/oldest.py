"""Print the oldest requirements that the installed package allows: for pip, with `==` for `>=`."""

from importlib.metadata import requires

own = [line for line in requires("tritoncaps") or [] if "extra ==" not in line]
print("\n".join(line.replace(">=", "==") for line in own))
