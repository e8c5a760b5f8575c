"""One thin file, one job, one `strata` subcommand: `python -m jobs.run CONF` is `strata run CONF`."""

__all__: list[str] = []
