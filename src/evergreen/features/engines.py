"""The engines that run feature expressions: DuckDB in this process, and Spark, here or on a cluster.

An engine reads event files as an Ibis table, and writes an Ibis table as Parquet by date. Times are UTC on both,
whatever the machine says; a test holds both to the same values.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.dataset as ds

from evergreen.contracts.errors import ArtifactError, EvergreenError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DATE = "date"
"""The column that partitions are named by. No feature may have this name (`contracts.mapping.RESERVED_NAMES`)."""

_BATCH_ROWS = 102_400  # also of a row group


class Engine(Protocol):
    """What runs feature expressions."""

    def read(self, files: Sequence[str]) -> ir.Table:
        """The rows of a snapshot's event files.

        Raises:
            ArtifactError: a file cannot be read; says which.
        """

    def write_by_date(self, table: ir.Table, folder: Path, *, schema: pa.Schema, order: Sequence[str]) -> None:
        """Write a table as `folder`/date=YYYY-MM-DD/part-*.parquet.

        Args:
            table: made from what `read` gave; has an event_timestamp.
            folder: to be made.
            schema: of the files.
            order: how the rows of a file are sorted.

        Raises:
            ArtifactError: it cannot be computed or written; says why.
        """


class DuckDBEngine:
    """DuckDB, in this process."""

    def __init__(self, connection: ibis.backends.duckdb.Backend) -> None:
        self.connection = connection

    def read(self, files: Sequence[str]) -> ir.Table:
        """See `Engine`."""
        with _duckdb_errors("the events cannot be read"):
            return self.connection.read_parquet(list(files), hive_partitioning=False)

    def write_by_date(self, table: ir.Table, folder: Path, *, schema: pa.Schema, order: Sequence[str]) -> None:
        """See `Engine`. The same rows give the same bytes, however many threads there are."""
        dated = table.mutate(**{DATE: table.event_timestamp.strftime("%Y-%m-%d")}).order_by([DATE, *order])
        self.connection.create_view("feature_table", dated, overwrite=True)
        with_date = pa.schema([*schema, pa.field(DATE, pa.string())])
        parquet = ds.ParquetFileFormat()
        with (
            _duckdb_errors(f"{folder.name} cannot be computed"),
            # Ibis 12 asks DuckDB for batches by a name that DuckDB 2 no longer has.
            self.connection.con.table("feature_table").to_arrow_reader(_BATCH_ROWS) as batches,
        ):
            ds.write_dataset(
                pa.RecordBatchReader.from_batches(with_date, (batch.cast(with_date) for batch in batches)),
                folder,
                format=parquet,
                file_options=parquet.make_write_options(compression="zstd"),
                partitioning=ds.partitioning(pa.schema([with_date.field(DATE)]), flavor="hive"),
                basename_template="part-{i}.parquet",
                use_threads=False,
                max_rows_per_group=_BATCH_ROWS,
                max_partitions=_BATCH_ROWS,
            )


class SparkEngine:
    """Spark, by a session that someone else starts and stops."""

    def __init__(self, session: SparkSession) -> None:
        self.session = session
        self.connection = ibis.pyspark.connect(session)  # sets the session's time zone to UTC
        # Spark's default is a type that Parquet has given up, and that readers take for local time.
        session.conf.set("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")

    def read(self, files: Sequence[str]) -> ir.Table:
        """See `Engine`."""
        with _spark_errors("the events cannot be read"):
            self.session.read.parquet(*map(_url, files)).createOrReplaceTempView("events")
            return self.connection.table("events")

    def write_by_date(self, table: ir.Table, folder: Path, *, schema: pa.Schema, order: Sequence[str]) -> None:
        """See `Engine`."""
        from pyspark.sql import functions

        with _spark_errors(f"{folder.name} cannot be computed"):
            self.connection.create_view("feature_table", table, overwrite=True)
            frame = self.session.table("feature_table").select(schema.names)
            frame = frame.withColumn(DATE, functions.date_format("event_timestamp", "yyyy-MM-dd"))
            # A date's rows into one file, or a few when they are many. Else every task writes a file for every date.
            frame = frame.hint("rebalance", DATE).sortWithinPartitions(DATE, *order)
            frame.write.partitionBy(DATE).option("compression", "zstd").parquet(_url(folder))
        for checksum in folder.rglob(".*.crc"):  # of Hadoop's local file system alone; Parquet has its own
            checksum.unlink()


@contextmanager
def duckdb_engine(spill: Path, *, memory_limit: str = "4GB", threads: int | None = None) -> Iterator[DuckDBEngine]:
    """A DuckDB of its own.

    Args:
        spill: folder for what does not fit into memory.
        memory_limit: how much DuckDB may hold before it spills.
        threads: default: one a core. The result does not depend on it.
    """
    options = {"memory_limit": memory_limit} | ({} if threads is None else {"threads": threads})
    connection = ibis.duckdb.connect(temp_directory=str(spill), **options)
    try:
        connection.raw_sql("SET TimeZone = 'UTC'")
        yield DuckDBEngine(connection)
    finally:
        connection.disconnect()


@contextmanager
def spark_engine(*, master: str | None = None, settings: Mapping[str, str] | None = None) -> Iterator[SparkEngine]:
    """A Spark session: a new one, which is stopped at the end, or the one that this process has.

    Args:
        master: e.g. local[2]. Default: what spark-submit says, and else all cores of this machine.
        settings: Spark's own, e.g. {"spark.driver.memory": "8g"}; win over those of spark-submit.

    Raises:
        EvergreenError: PySpark or Java is not installed, or Spark does not start.
    """
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise EvergreenError("Spark is not installed: uv sync --extra spark, or --engine duckdb") from error
    running = SparkSession.getActiveSession()
    builder = SparkSession.builder.appName("evergreen-features")
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # else spark-submit has started Java and decided on the rest
        _check_java()
        # At WARN, Spark complains of every window over all rows: the prior of each hour, some thousand small rows.
        quiet = {"spark.log.level": "ERROR", "spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
        settings = quiet | dict(settings or {})
    for name, value in (settings or {}).items():
        builder = builder.config(name, value)
    if master is not None:
        builder = builder.master(master)
    try:
        session = builder.getOrCreate()
    except (PySparkException, RuntimeError) as error:
        raise EvergreenError(f"Spark does not start on {master or 'its default master'}: {_reason(error)}") from error
    try:
        yield SparkEngine(session)
    finally:
        if running is None:
            session.stop()


def _check_java() -> None:
    java_home = os.environ.get("JAVA_HOME")
    if shutil.which("java", path=str(Path(java_home) / "bin") if java_home else None) is None:
        where = f"under JAVA_HOME={java_home}" if java_home else "on the PATH"
        raise EvergreenError(
            f"there is no java {where}, and Spark runs on it: apt-get install openjdk-17-jre-headless, "
            "or set JAVA_HOME to a Java 17, or use --engine duckdb"
        )


def _url(path: str | Path) -> str:
    """A local path for Spark, whose default file system may be another one; unlike a URI it is not escaped."""
    return f"file://{Path(path).absolute()}"


@contextmanager
def _duckdb_errors(what: str) -> Iterator[None]:
    import duckdb

    try:
        yield
    except (duckdb.Error, OSError) as error:
        raise ArtifactError(f"{what}: DuckDB says: {error}") from error


@contextmanager
def _spark_errors(what: str) -> Iterator[None]:
    from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        raise ArtifactError(f"{what}: Spark says: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What went wrong first, and what that broke: the ends of Java's chain of causes, without its stacks."""
    cause = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    if cause is None:
        return str(error).strip().partition("\n")[0]
    lines = []
    while cause is not None:
        lines.append(str(cause.toString()).partition("\n")[0])
        cause = cause.getCause()
    return "; because of ".join(lines[-2:])
