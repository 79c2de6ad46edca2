"""What each method is and needs, for clients that choose one and for the rules that check a spec."""

from kdcore.catalog.facts import MethodFacts
from kdcore.catalog.methods.features import FEATURES
from kdcore.catalog.methods.relations import RELATIONS
from kdcore.catalog.methods.response import RESPONSE
from kdcore.catalog.methods.schemes import SCHEMES

METHODS: dict[str, MethodFacts] = {facts.name: facts for facts in (*RESPONSE, *FEATURES, *RELATIONS, *SCHEMES)}
