// The one place that decides which instruction set runs.
#pragma once

#include <string>

#include "kernels/kernels.h"

namespace squeezellm_hf {

// The kernels in use. On first use: those that SQUEEZELLM_HF_ISA names, else the fastest that the
// processor and the operating system support. Throws std::invalid_argument for an unknown name or
// an instruction set that this machine lacks.
const Kernels& active_kernels();

// Switches to a named instruction set, or, for an empty name, back to the choice above.
void select_kernels(const std::string& name);

// Names of the instruction sets that can run here, slowest first.
std::string available_kernels();

}  // namespace squeezellm_hf
