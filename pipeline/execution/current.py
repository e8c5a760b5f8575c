"""What serves as a job starts."""

from dataclasses import dataclass

from pipeline.artifacts import AliasEntry, IndexManifest, ReleaseRecord
from pipeline.errors import MissingFileError
from pipeline.release import read_alias, read_manifest, read_release
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store

__all__ = ["Current"]


@dataclass(frozen=True)
class Current:
    """The current release, and the alias entry that names it, which a job may follow."""

    alias: AliasEntry
    record: ReleaseRecord
    manifest: IndexManifest

    @classmethod
    def read(cls, store: Store) -> "Current":
        """As it is now.

        Raises:
            MissingFileError: Nothing is published.
        """
        alias = read_alias(store)
        if alias is None:
            raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
        record = read_release(store, alias.release)
        return cls(alias, record, read_manifest(store, record))

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
