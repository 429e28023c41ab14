//! Keys and their text forms.
