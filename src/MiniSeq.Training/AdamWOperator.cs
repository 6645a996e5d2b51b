using static TorchSharp.torch;

namespace MiniSeq.Training;

/// <summary>AdamW through libtorch's fused operator, on any device and for every type: what <see cref="AdamWKernel"/> does not read.</summary>
/// <remarks>
/// bfloat16 moments are widened, updated and rounded again a block at a time. They are rounded stochastically with the device's own random
/// numbers, so they are not those of the CPU's kernel.
/// </remarks>
internal static class AdamWOperator
{
    private const long BlockElements = 4 << 20;

    // Stochastic rounding is rounding to nearest after noise of up to half of the last of a bfloat16's 8 digits.
    private static readonly Lazy<jit.CompilationUnit> s_fused = new(() => jit.compile(
        """
        def step(p: List[Tensor], g: List[Tensor], m: List[Tensor], v: List[Tensor], s: List[Tensor], lr: float, b1: float, b2: float, wd: float, eps: float):
            none: List[Tensor] = []
            torch._fused_adamw_(p, g, m, v, none, s, lr=lr, beta1=b1, beta2=b2, weight_decay=wd, eps=eps, amsgrad=False, maximize=False)
            return s[0]

        def round_to(target: Tensor, wide: Tensor):
            mantissa, exponent = torch.frexp(wide)
            noise = torch.ldexp((torch.rand_like(wide) - 0.5) * torch.ne(mantissa, 0), exponent - 8)
            return target.copy_(wide + noise)

        """));

    /// <summary>One step of parameters whose step has begun.</summary>
    public static void Update(IEnumerable<AdamWState> states, AdamWNumbers numbers)
    {
        foreach (var group in states.GroupBy(s => (s.Decays, s.Parameter.dtype, s.Steps, s.Narrow)))
        {
            AdamWState[] all = [.. group];
            if (group.Key.Narrow) Array.ForEach(all, s => UpdateNarrow(s, numbers));
            else Invoke(all, s => s.Master, s => s.Gradient, s => s.First, s => s.Second, all[0], numbers);
            foreach (var s in all)
                if (s.HasMaster) s.Parameter.copy_(s.Master);
        }
    }

    private static void UpdateNarrow(AdamWState state, AdamWNumbers numbers)
    {
        Tensor master = state.Master.view(-1), gradient = state.Gradient.view(-1), first = state.First.view(-1), second = state.Second.view(-1);
        Layers.Chunking.ForEach(master.numel(), BlockElements, (start, count) =>
        {
            Tensor At(Tensor t) => t.narrow(0, start, count);
            var (m, v) = (At(first).to(master.dtype), At(second).to(master.dtype));
            Invoke([state], _ => At(master), _ => At(gradient), _ => m, _ => v, state, numbers);
            s_fused.Value.invoke("round_to", At(first), m);
            s_fused.Value.invoke("round_to", At(second), v);
        });
    }

    private static void Invoke(AdamWState[] states, Func<AdamWState, Tensor> weight, Func<AdamWState, Tensor> gradient, Func<AdamWState, Tensor> first, Func<AdamWState, Tensor> second,
        AdamWState any, AdamWNumbers n)
    {
        Tensor[] All(Func<AdamWState, Tensor> part) => Array.ConvertAll(states, s => part(s));
        var steps = full([], any.Steps, ScalarType.Float32, any.Parameter.device);
        s_fused.Value.invoke("step", All(weight), All(gradient), All(first), All(second), All(_ => steps), n.LearningRate, n.Beta1, n.Beta2, any.Decays ? n.WeightDecay : 0, n.Epsilon);
    }
}
