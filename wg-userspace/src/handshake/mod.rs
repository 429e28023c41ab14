//! The pool beside the workers, and what drives sessions.
