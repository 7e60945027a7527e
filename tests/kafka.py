"""A real Kafka broker for tests: one KRaft node on loopback, from Maven Central's jars, ended by its process id."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.servers import free_port

KAFKA_VERSION = "4.1.1"
START_SECONDS = 90.0
_CLUSTER_ID = "ZXZlcmdyZWVuLXRlc3RzLS0"
_JARS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evergreen" / f"kafka-{KAFKA_VERSION}"
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>evergreen</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
  </dependency></dependencies>
</project>
"""


def kafka_jars() -> Path:
    """Folder of the broker's jars (43 MB), fetched once; skips the test where that cannot be."""
    for program, package in (("java", "openjdk-17-jre-headless"), ("mvn", "maven")):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this machine: apt-get install -y {package}")
    if not _JARS.is_dir():
        _JARS.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_JARS.parent) as scratch:
            (Path(scratch) / "pom.xml").write_text(_POM)
            copy = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=jars"]
            done = subprocess.run(copy, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode != 0:
                pytest.skip(f"Kafka's jars cannot be fetched: {(done.stdout + done.stderr)[-500:]}")
            if not _JARS.is_dir():  # another process may have been faster
                (Path(scratch) / "jars").rename(_JARS)
    return _JARS


class KafkaBroker:
    """A broker whose log is in a folder: what restarts, goes on with it."""

    def __init__(self, folder: Path, jars: Path) -> None:
        self._folder = folder
        self._port, controller = free_port(), free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._java = ["java", "-Xmx400m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", f"{jars}/*"]
        self._process: subprocess.Popen[bytes] | None = None
        self._properties = folder / "server.properties"
        self._properties.write_text(
            f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{controller}
controller.listener.names=CONTROLLER
log.dirs={folder}/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""
        )
        self._run("kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(self._properties))

    def start(self) -> None:
        """Start, and wait until it answers."""
        with (self._folder / "broker.out").open("ab") as out:
            self._process = subprocess.Popen(
                [*self._java, "kafka.Kafka", str(self._properties)], stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                AdminClient({"bootstrap.servers": self.address, "log_level": 0}).list_topics(timeout=1)
                return
            except KafkaException:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no broker: {(self._folder / 'broker.out').read_text()[-2000:]}") from None

    def kill(self) -> None:
        """End the broker's own process as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic, and wait until it is there."""
        admin = AdminClient({"bootstrap.servers": self.address})  # kept: its answer dies with it
        for future in admin.create_topics([NewTopic(name, partitions, 1)]).values():
            future.result(timeout=30)

    def delete_topics(self, *names: str) -> None:
        """Delete topics, and wait until they are gone."""
        admin = AdminClient({"bootstrap.servers": self.address})
        for future in admin.delete_topics(list(names)).values():
            future.result(timeout=30)
        while admin.list_topics(timeout=10).topics.keys() & set(names):
            time.sleep(0.05)

    def delete_before(self, topic: str, offsets: dict[int, int]) -> None:
        """Delete the messages before these offsets, as retention would."""
        admin = AdminClient({"bootstrap.servers": self.address})
        places = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
        for future in admin.delete_records(places).values():
            future.result(timeout=30)

    def _run(self, main: str, *arguments: str) -> None:
        done = subprocess.run([*self._java, main, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{main}: {done.stdout}{done.stderr}")


@contextmanager
def kafka_broker() -> Iterator[KafkaBroker]:
    """A running broker, ready after about ten seconds."""
    jars = kafka_jars()
    with tempfile.TemporaryDirectory(prefix="evergreen-kafka-") as folder:
        broker = KafkaBroker(Path(folder), jars)
        broker.start()
        try:
            yield broker
        finally:
            broker.kill()
