//! What workers count: one writer each, summed for whoever asks.
