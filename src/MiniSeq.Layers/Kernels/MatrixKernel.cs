using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Layers.Kernels;

/// <summary>
/// The product of two bfloat16 tiles with a float32 result, C = A B or C += A B, of which the kernels of this folder are made: oneDNN's
/// brgemm, as libtorch's own kernels call it. It reaches the machine's peak on tiles of 64 rows, and its sums stay float32.
/// </summary>
/// <remarks>
/// A [M, K] row by row; B [K, N] in pairs of rows, [K/2, N, 2] (<see cref="Tiles"/>); K even. oneDNN compiles each shape once a thread and
/// keeps it, so tiles come in few shapes and are padded with zeros. A bfloat16 number is a <c>ushort</c> here.
/// </remarks>
internal static unsafe class MatrixKernel
{
    private const string Library = "torch_cpu";
    private const string Product = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
    private const string ReleaseProduct = "_ZN2at6native7cpublas14brgemm_releaseEb";

    private static readonly Lazy<bool> s_isSupported = new(() => IsWanted() && HasInstructions() && HasExports() && Checks());

    /// <summary>Whether kernels take tensors like this: bfloat16 on a CPU that multiplies it (AVX-512 BF16), on Linux, unless the environment variable MINISEQ_KERNELS is 0.</summary>
    public static bool Takes(Tensor t) => Takes(t.dtype, t.device_type);

    /// <summary>The same of a type on a kind of device.</summary>
    public static bool Takes(ScalarType dtype, DeviceType device) => dtype == ScalarType.BFloat16 && device == DeviceType.CPU && s_isSupported.Value;

    /// <summary>C = A B, or C += A B if <paramref name="add"/>. A [m, k] and C [m, n] have lda and ldc numbers a row, packed B [k/2, n, 2] has ldb pairs.</summary>
    public static void Multiply(int m, int n, int k, ushort* a, int lda, ushort* b, int ldb, float* c, int ldc, bool add) =>
        brgemm(m, n, k, lda, ldb, ldc, add ? (byte)1 : (byte)0, a, b, c, 1);

    /// <summary>A thread is done: where the CPU has tile registers (AMX), it gives them back.</summary>
    public static void Release() => brgemm_release(1);

    /// <summary>Where a contiguous tensor's numbers are; it must outlive the use.</summary>
    public static void* Pointer(Tensor t)
    {
        if (!t.is_contiguous()) throw new ArgumentException("A kernel reads contiguous tensors.", nameof(t));
        return Aten.DataPointer(t);
    }

    // Without the kernels everything still runs, on libtorch's operators: to tell whose fault something is.
    private static bool IsWanted() => Environment.GetEnvironmentVariable("MINISEQ_KERNELS") != "0";

    // An instruction set lowered by hand would make libtorch refuse the kernel with an exception that no .NET program can catch.
    private static bool HasInstructions() =>
        OperatingSystem.IsLinux() && Avx512BW.IsSupported && Avx512F.IsSupported
        && X86Base.CpuId(7, 1).Eax is var features && (features & (1 << 5)) != 0 // AVX512_BF16
        && Environment.GetEnvironmentVariable("ONEDNN_MAX_CPU_ISA") is null && Environment.GetEnvironmentVariable("DNNL_MAX_CPU_ISA") is null;

    private static bool HasExports()
    {
        using var loaded = empty(0); // TorchSharp has found libtorch
        return NativeLibrary.TryLoad(Library, typeof(MatrixKernel).Assembly, null, out var library)
            && NativeLibrary.TryGetExport(library, Product, out _) && NativeLibrary.TryGetExport(library, ReleaseProduct, out _);
    }

    private static bool Checks()
    {
        const int M = 32, N = 32, K = 32;
        ushort* a = stackalloc ushort[M * K], b = stackalloc ushort[K * N];
        float* c = stackalloc float[M * N];
        for (int i = 0; i < M * K; i++) a[i] = b[i] = 0x3F80; // 1
        Multiply(M, N, K, a, K, b, N, c, N, add: false);
        Multiply(M, N, K, a, K, b, N, c, N, add: true);
        Release();
        return c[0] == 2 * K && c[(M * N) - 1] == 2 * K;
    }

    [DllImport(Library, EntryPoint = Product)]
    private static extern void brgemm(long m, long n, long k, long lda, long ldb, long ldc, byte add, ushort* a, ushort* b, float* c, byte packed);

    [DllImport(Library, EntryPoint = ReleaseProduct)]
    private static extern void brgemm_release(byte packed);
}
