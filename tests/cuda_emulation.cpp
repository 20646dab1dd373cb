// The switches of the emulation that tests turn.
#include "cuda/device.h"

extern "C" void panda_emulate_backwards(int on) { panda::emulation::backwards = on != 0; }
