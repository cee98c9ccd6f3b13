"""Lets detect-secrets know what our API keys look like."""

import re

from detect_secrets.plugins.base import RegexBasedDetector


class ApiKeyDetector(RegexBasedDetector):
    """`ecipay_`, an id, and what is secret."""

    secret_type = "eci-pay API key"  # noqa: S105  # pragma: allowlist secret - what it is called
    denylist = (re.compile(r"ecipay_[0-9a-z]{12}_[\w-]{43}"),)
