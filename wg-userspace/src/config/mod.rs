//! Text of wg0.conf to Config; errors name file, line and column.
