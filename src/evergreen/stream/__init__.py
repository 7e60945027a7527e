"""The stream: click events from Kafka become the features of the last minutes, as they happen."""
