"""What programs share: settings, their checks, exit codes and result files."""
