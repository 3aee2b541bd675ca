"""Measurements that the documentation quotes; nothing else imports this."""
