"""Tests of `crustcredits._ratelimit`."""
