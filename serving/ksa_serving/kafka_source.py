"""`Source` by Kafka's protocol (Kafka, Redpanda and others), through confluent-kafka: the extra `kafka`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ksa_serving.consumption import SourceMessage
from ksa_serving.errors import SourceError
from recsys_ksa.errors import MissingPackageError

logger = logging.getLogger(__name__)


class KafkaSource:
    """One topic, read as a member of a consumer group. Offsets are committed by `commit` alone.

    Args:
        brokers: `HOST:PORT,...`.
        settings: further settings of librdkafka, as for TLS or SASL.

    Raises:
        MissingPackageError: confluent-kafka is not installed.
        SourceError: librdkafka refuses the brokers, the topic or a setting.
    """

    def __init__(self, brokers: str, topic: str, group: str, settings: Mapping[str, str] | None = None):
        try:
            import confluent_kafka
        except ImportError as error:
            raise MissingPackageError(f"ksa consume: expected the package confluent-kafka, got: {error}.") from error
        self._kafka: Any = confluent_kafka
        self._topic = topic
        self._held: set[int] = set()
        if not brokers:
            raise SourceError("brokers: expected HOST:PORT,..., got none.")
        wanted = {
            **(settings or {}),
            "bootstrap.servers": brokers,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
        }
        told = {"on_assign": self._taken, "on_revoke": self._given_away, "on_lost": self._given_away}
        try:
            self._consumer: Any = confluent_kafka.Consumer(wanted)
            self._consumer.subscribe([topic], **told)
        except confluent_kafka.KafkaException as error:
            raise SourceError(f"{topic!r}: expected to read it, got: {error.args[0].str()}. Check --kafka.") from error

    def poll(self, most: int, seconds: float) -> Sequence[SourceMessage]:
        """Return the next messages.

        Raises:
            SourceError: the broker refuses for good.
        """
        found: list[SourceMessage] = []
        for message in self._consumer.consume(most, timeout=seconds):
            error = message.error()
            if error is None:
                found.append(SourceMessage(message.partition(), message.offset(), message.key(), message.value()))
            elif error.fatal() or error.code() in (
                self._kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED,
                self._kafka.KafkaError.UNKNOWN_TOPIC_OR_PART,
            ):
                raise SourceError(f"{self._topic}: expected messages, got: {error.str()}. Check topic and rights.")
            else:
                logger.warning("consume: %s", error.str())
        return found

    def commit(self, positions: Mapping[int, int]) -> None:
        """Commit the positions of partitions that are still this consumer's."""
        mine = [
            self._kafka.TopicPartition(self._topic, partition, offset)
            for partition, offset in positions.items()
            if partition in self._held
        ]
        if not mine:
            return
        try:
            self._consumer.commit(offsets=mine, asynchronous=False)
        except self._kafka.KafkaException as error:  # the next owner delivers them again, and they are known
            logger.warning("consume: positions were not committed: %s", error)

    def close(self) -> None:
        """Leave the group."""
        self._consumer.close()

    def _taken(self, _: object, partitions: Sequence[Any]) -> None:
        self._held.update(each.partition for each in partitions)

    def _given_away(self, _: object, partitions: Sequence[Any]) -> None:
        self._held.difference_update(each.partition for each in partitions)
