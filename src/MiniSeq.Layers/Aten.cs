using System.Runtime.InteropServices;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// Operators that TorchSharp does not bind: through TorchScript, and through libtorch's stable C interface, where a handle is
/// <c>Tensor.Handle</c>.
/// </summary>
internal static unsafe class Aten
{
    private const string Library = "torch_cpu";

    // A mistake in a script ends the process, so it is a constant, and every function of it is under test.
    private static readonly Lazy<jit.CompilationUnit> s_script = new(() => jit.compile(
        """
        def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float):
            return torch.scaled_dot_product_attention(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=True)

        def silu_backward(dy: Tensor, x: Tensor):
            return torch.silu_backward(dy, x)

        def gelu_tanh_backward(dy: Tensor, x: Tensor):
            return torch.gelu_backward(dy, x, approximate="tanh")

        """));

    /// <summary>softmax(scale · Q Kᵀ) V on any device, recorded by autograd. q [b, Hq, S, D], k and v [b, Hkv, T, D].</summary>
    public static Tensor ScaledDotProductAttention(Tensor q, Tensor k, Tensor v, bool causal, double scale) =>
        (Tensor)s_script.Value.invoke("attention", q, k, v, causal, scale)!;

    /// <summary>dx of y = x σ(x), in one pass.</summary>
    public static Tensor SiluBackward(Tensor dy, Tensor x) => (Tensor)s_script.Value.invoke("silu_backward", dy, x)!;

    /// <summary>dx of GELU in its tanh form, in one pass.</summary>
    public static Tensor GeluTanhBackward(Tensor dy, Tensor x) => (Tensor)s_script.Value.invoke("gelu_tanh_backward", dy, x)!;

    /// <summary>Output [b, Hq, S, D] and log-sum-exp [b, Hq, S] of q [b, Hq, S, D] and k, v [b, Hkv, T, D] on the CPU.</summary>
    public static (Tensor Output, Tensor LogSumExp) FlashAttention(Tensor q, Tensor k, Tensor v, bool causal, double scale)
    {
        IntPtr output, lse;
        Check(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(q.Handle, k.Handle, v.Handle, 0, causal ? 1 : 0, null, &scale, &output, &lse),
            "flash attention", q, k, v);
        return (Tensor.UnsafeCreateTensor(output), Tensor.UnsafeCreateTensor(lse));
    }

    /// <summary>Gradients of q, k and v, shaped like them.</summary>
    public static (Tensor Dq, Tensor Dk, Tensor Dv) FlashAttentionBackward(Tensor dOutput, Tensor q, Tensor k, Tensor v, Tensor output, Tensor logSumExp, bool causal, double scale)
    {
        IntPtr dq, dk, dv;
        Check(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(dOutput.Handle, q.Handle, k.Handle, v.Handle, output.Handle, logSumExp.Handle,
            0, causal ? 1 : 0, null, &scale, &dq, &dk, &dv), "flash attention backward", dOutput, q, k, v, output, logSumExp);
        return (Tensor.UnsafeCreateTensor(dq), Tensor.UnsafeCreateTensor(dk), Tensor.UnsafeCreateTensor(dv));
    }

    /// <summary>Where a CPU tensor's first element is. Valid as long as the tensor is: the caller keeps it alive.</summary>
    public static void* DataPointer(Tensor tensor)
    {
        void* pointer;
        Check(aoti_torch_get_data_ptr(tensor.Handle, &pointer), "the address", tensor);
        return pointer;
    }

    // Keeps the wrappers alive across the native call too: only their handles went in.
    private static void Check(int result, string name, params Tensor[] arguments)
    {
        if (result != 0)
            throw new InvalidOperationException($"libtorch refused {name} for {string.Join(", ", arguments.Select(a => $"{a.dtype} [{string.Join(", ", a.shape)}]"))}; its own message is on standard error.");
        GC.KeepAlive(arguments);
    }

    [DllImport(Library)] private static extern int aoti_torch_get_data_ptr(IntPtr tensor, void** pointer);
    [DllImport(Library)] private static extern int aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(IntPtr q, IntPtr k, IntPtr v, double dropout, int causal, IntPtr* mask, double* scale, IntPtr* output, IntPtr* lse);
    [DllImport(Library)] private static extern int aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(IntPtr dOutput, IntPtr q, IntPtr k, IntPtr v, IntPtr output, IntPtr lse, double dropout, int causal, IntPtr* mask, double* scale, IntPtr* dq, IntPtr* dk, IntPtr* dv);
}
