//! Arguments in, exit code and readable errors out.
