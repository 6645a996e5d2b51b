using System.Numerics;
using MiniSeq.Layers;
using static TorchSharp.torch;

namespace MiniSeq.Training;

/// <summary>
/// AdamW over the memory of CPU tensors: one pass reads gradient, weight and moments, writes the last three, and the bfloat16 parameter of a
/// float32 master. Moments are float32, or bfloat16 with stochastic rounding; arithmetic is float32.
/// </summary>
/// <remarks>A random number depends on the seed, the parameter, the step and the element: not on threads, vector width or the order of parameters.</remarks>
internal readonly unsafe struct AdamWKernel
{
    private const long BlockElements = 1 << 16; // of one thread at a time; also the reach of an element's number in its block

    private readonly Memory _memory;
    private readonly bool _narrow;
    private readonly ulong _key;
    private readonly Vector<float> _decay, _beta1Rest, _beta2, _beta2Rest, _rate, _secondScale, _epsilon;

    /// <summary>Whether a parameter's memory is of the kind that this kernel reads.</summary>
    public static bool Fits(AdamWState state) =>
        state.Parameter.device_type == TorchSharp.DeviceType.CPU && state.Parameter.dtype is ScalarType.Float32 or ScalarType.BFloat16 && state.Parameter.is_contiguous();

    /// <summary>One step of one parameter, whose step has begun.</summary>
    public static void Update(AdamWState state, AdamWNumbers numbers)
    {
        var (parameter, gradient) = (state.Parameter, state.Gradient);
        var memory = new Memory((float*)Aten.DataPointer(state.Master), state.HasMaster ? (ushort*)Aten.DataPointer(parameter) : null,
            (float*)Aten.DataPointer(gradient), Aten.DataPointer(state.First), Aten.DataPointer(state.Second));
        var kernel = new AdamWKernel(memory, state, numbers);
        long count = parameter.numel(), blocks = (count + BlockElements - 1) / BlockElements;
        if (blocks <= 1) kernel.Block(0, count);
        else Parallel.For(0, blocks, new ParallelOptions { MaxDegreeOfParallelism = get_num_threads() }, block => kernel.Block(block, Math.Min(BlockElements, count - (block * BlockElements))));
        GC.KeepAlive(state);
        GC.KeepAlive(gradient);
    }

    private AdamWKernel(Memory memory, AdamWState state, AdamWNumbers n)
    {
        double bias1 = 1 - Math.Pow(n.Beta1, state.Steps), bias2 = 1 - Math.Pow(n.Beta2, state.Steps);
        (_memory, _narrow) = (memory, state.Narrow);
        _key = Mix(Mix(Mix((uint)n.Seed) + (uint)state.Index) + (uint)state.Steps);
        _decay = All(state.Decays ? 1 - (n.LearningRate * n.WeightDecay) : 1);
        (_beta1Rest, _beta2, _beta2Rest) = (All(1 - n.Beta1), All(n.Beta2), All(1 - n.Beta2));
        (_rate, _secondScale, _epsilon) = (All(n.LearningRate / bias1), All(1 / Math.Sqrt(bias2)), All(n.Epsilon));

        static Vector<float> All(double value) => Vector.Create((float)value);
    }

    private void Block(long block, long count)
    {
        ulong key = Mix(_key + (ulong)block);
        long start = block * BlockElements, whole = count - (count % Vector<ushort>.Count);
        for (long i = 0; i < whole; i += Vector<ushort>.Count) Elements(_memory, start + i, (uint)i, key);
        if (whole < count) Rest(start + whole, (int)(count - whole), (uint)whole, key);
    }

    // The last elements, fewer than a vector, in a place where a vector may be read and written.
    private void Rest(long at, int count, uint index, ulong key)
    {
        int width = Vector<ushort>.Count;
        float* room = stackalloc float[5 * width];
        new Span<float>(room, 5 * width).Clear();
        var aside = new Memory(room, _memory.Rounded is null ? null : (ushort*)(room + (4 * width)), room + width, room + (2 * width), room + (3 * width));
        Memory.Copy(_memory, at, aside, 0, count, MomentBytes);
        Elements(aside, 0, index, key);
        Memory.Copy(aside, 0, _memory, at, count, MomentBytes);
    }

    // A vector of 16-bit numbers is two of float32. The index is the element's in its block.
    private void Elements(in Memory memory, long at, uint index, ulong key)
    {
        int half = Vector<float>.Count;
        float* weight = memory.Weight + at, gradient = memory.Gradient + at;
        var (firstLow, firstHigh) = Load(memory.First, at);
        var (secondLow, secondHigh) = Load(memory.Second, at);
        var low = One(Vector.Load(weight), Vector.Load(gradient), ref firstLow, ref secondLow);
        var high = One(Vector.Load(weight + half), Vector.Load(gradient + half), ref firstHigh, ref secondHigh);
        Store(weight, low, high);
        if (memory.Rounded is not null) Vector.Narrow(Nearest(low), Nearest(high)).Store(memory.Rounded + at);
        if (!_narrow)
        {
            Store((float*)memory.First + at, firstLow, firstHigh);
            Store((float*)memory.Second + at, secondLow, secondHigh);
            return;
        }
        var (noiseLow, noiseHigh) = (Noise(index, key), Noise(index + (uint)half, key)); // 16 bits for each moment
        var mask = Vector.Create(0xFFFFu);
        Vector.Narrow(Up(firstLow, noiseLow & mask), Up(firstHigh, noiseHigh & mask)).Store((ushort*)memory.First + at);
        Vector.Narrow(Up(secondLow, noiseLow >>> 16), Up(secondHigh, noiseHigh >>> 16)).Store((ushort*)memory.Second + at);
    }

    private Vector<float> One(Vector<float> weight, Vector<float> gradient, ref Vector<float> first, ref Vector<float> second)
    {
        first += (gradient - first) * _beta1Rest;
        second = (second * _beta2) + (gradient * gradient * _beta2Rest);
        return (weight * _decay) - (_rate * first / ((Vector.SquareRoot(second) * _secondScale) + _epsilon));
    }

    private int MomentBytes => _narrow ? sizeof(ushort) : sizeof(float);

    private (Vector<float> Low, Vector<float> High) Load(void* moment, long at)
    {
        if (!_narrow) return (Vector.Load((float*)moment + at), Vector.Load((float*)moment + at + Vector<float>.Count));
        Vector.Widen(Vector.Load((ushort*)moment + at), out var low, out var high);
        return (Vector.AsVectorSingle(low << 16), Vector.AsVectorSingle(high << 16));
    }

    private static void Store(float* to, Vector<float> low, Vector<float> high)
    {
        low.Store(to);
        high.Store(to + Vector<float>.Count);
    }

    // The upper half after a number below 2^16 is added: up with the probability of what is cut off, in units of the last digit.
    private static Vector<uint> Up(Vector<float> value, Vector<uint> noise) => (Vector.AsVectorUInt32(value) + noise) >>> 16;

    // To the nearest, halves to even, as libtorch rounds; NaN stays one.
    private static Vector<uint> Nearest(Vector<float> value)
    {
        var bits = Vector.AsVectorUInt32(value);
        var rounded = (bits + Vector.Create(0x7FFFu) + ((bits >>> 16) & Vector<uint>.One)) >>> 16;
        return Vector.ConditionalSelect(Vector.AsVectorUInt32(Vector.Equals(value, value)), rounded, Vector.Create(0x7FC0u));
    }

    // 32 random bits for each number: lowbias32 (Wellons 2018), keyed at two places so that blocks share no sequence.
    private static Vector<uint> Noise(uint index, ulong key)
    {
        var x = Vector<uint>.Indices + Vector.Create(index + (uint)key);
        x = (x ^ (x >>> 16)) * 0x7FEB352Du;
        x = (x ^ (x >>> 15)) + Vector.Create((uint)(key >> 32));
        x *= 0x846CA68Bu;
        return x ^ (x >>> 16);
    }

    // SplitMix64.
    private static ulong Mix(ulong x)
    {
        x += 0x9E3779B97F4A7C15;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        return x ^ (x >> 31);
    }

    /// <summary>Where a parameter's numbers begin. Moments are float32 or bfloat16.</summary>
    private readonly struct Memory(float* weight, ushort* rounded, float* gradient, void* first, void* second)
    {
        public readonly float* Weight = weight;
        public readonly ushort* Rounded = rounded; // null where the weight is the parameter itself
        public readonly float* Gradient = gradient;
        public readonly void* First = first;
        public readonly void* Second = second;

        public static void Copy(in Memory from, long at, in Memory to, long place, int count, int momentBytes)
        {
            Copy(from.Weight, at, to.Weight, place, count, sizeof(float));
            Copy(from.Gradient, at, to.Gradient, place, count, sizeof(float));
            Copy(from.First, at, to.First, place, count, momentBytes);
            Copy(from.Second, at, to.Second, place, count, momentBytes);
            if (from.Rounded is not null) Copy(from.Rounded, at, to.Rounded, place, count, sizeof(ushort));
        }

        private static void Copy(void* from, long at, void* to, long place, int count, int size) =>
            Buffer.MemoryCopy((byte*)from + (at * size), (byte*)to + (place * size), count * size, count * size);
    }
}
