// Compiled with the flags that CMakeLists.txt gives to avx512bf16.
#define ISA avx512bf16
#define TRIMTAB_ISA avx512bf16
#define TRIMTAB_NAME "avx512bf16"
#define TRIMTAB_TABLE avx512bf16_kernels
#include <iterator>

#include "table.inc"
