// Compiled with the flags that CMakeLists.txt gives to avx512.
#define ISA avx512
#define TRIMTAB_ISA avx512
#define TRIMTAB_NAME "avx512"
#define TRIMTAB_TABLE avx512_kernels
#include <iterator>

#include "table.inc"
