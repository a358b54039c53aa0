"""A clone whose commands run in the tests' own process, which is faster than starting Python."""

import subprocess

from deploy.faults.clone import Clone, ddpm
from tests import command


class Here(Clone):
    def call(self, *words: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        own = ddpm()
        if words[: len(own)] != own:
            return super().call(*words, **settings)
        return command.ddpm(self.path, *words[len(own) :], environment=self.environment | settings)
