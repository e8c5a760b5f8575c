"""What serves as a job starts, and stays where there is nothing to do."""

from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import AliasEntry, IndexManifest, ReleaseRecord
from pipeline.errors import MissingFileError
from pipeline.release import read_alias, read_manifest, read_release
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store

__all__ = ["Current", "skipped"]


@dataclass(frozen=True)
class Current:
    """The current release, and the alias entry that names it, which a job may follow."""

    alias: AliasEntry
    record: ReleaseRecord
    manifest: IndexManifest

    @classmethod
    def find(cls, store: Store) -> "Current | None":
        """As it is now; None where nothing is published."""
        alias = read_alias(store)
        if alias is None:
            return None
        record = read_release(store, alias.release)
        return cls(alias, record, read_manifest(store, record))

    @classmethod
    def read(cls, store: Store) -> "Current":
        """As it is now.

        Raises:
            MissingFileError: Nothing is published.
        """
        current = cls.find(store)
        if current is None:
            raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
        return current

    @property
    def place(self) -> str:
        """For messages."""
        return f"release {self.record.release}"

    @property
    def query_encoder(self) -> EncoderIdentity:
        """Encoder of its queries."""
        return EncoderIdentity.model_validate(self.manifest.encoder)

    @property
    def vectors(self) -> int:
        """Rows of all partitions."""
        return sum(partition.rows for partition in self.manifest.partitions)

    def kept(self, names: tuple[str, ...]) -> dict[str, object]:
        """Of its summary, what a job leaves as it is."""
        return {name: self.record.summary[name] for name in names if name in self.record.summary}


def skipped(record: ReleaseRecord, seconds: float, **figures: object) -> dict[str, Any]:
    """The summary of a job that left the current release as it was.

    Args:
        record: That release.
        seconds: That it took to see so.
        figures: In the place of those of the job that made it.
    """
    found = {"release": record.release, "skipped": True, "seconds": {"total": round(seconds, 3)}}
    return {**record.summary, **figures, **found}
