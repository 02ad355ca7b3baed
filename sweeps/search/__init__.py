"""Which trials go on: schedulers' rules, without Ray and without rows."""
