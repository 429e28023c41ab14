//! Start, signals, stop; carries changes of the device to every other room.
