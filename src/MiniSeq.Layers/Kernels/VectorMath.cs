using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace MiniSeq.Layers.Kernels;

/// <summary>Functions of 16 numbers at a time. NaN goes through all of them, so that a damaged model is seen in its loss.</summary>
internal static unsafe class VectorMath
{
    private const float C0 = 1, C1 = 0.693121045f, C2 = 0.24022349f, C3 = 0.0559219758f, C4 = 0.00966636852f;

    /// <summary>log₂ e.</summary>
    public const float Log2E = 1.44269504f;

    /// <summary>ln 2.</summary>
    public const float Ln2 = 0.693147181f;

    /// <summary>2^x, relative error below 4e-6, a thousandth of what rounding to bfloat16 loses; 0 below −160.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<float> Exp2(Vector512<float> x)
    {
        x = Avx512F.Max(Vector512.Create(-160f), x); // the second operand where one is NaN
        var whole = Avx512F.RoundScale(x, 0);
        var f = x - whole; // in [−½, ½], where the polynomial meets 2^f at the five zeros of Chebyshev's
        var p = Avx512F.FusedMultiplyAdd(Vector512.Create(C4), f, Vector512.Create(C3));
        p = Avx512F.FusedMultiplyAdd(p, f, Vector512.Create(C2));
        p = Avx512F.FusedMultiplyAdd(p, f, Vector512.Create(C1));
        p = Avx512F.FusedMultiplyAdd(p, f, Vector512.Create(C0));
        return Avx512F.Scale(p, whole);
    }

    /// <summary>tanh x = 1 − 2 / (e^2x + 1).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<float> Tanh(Vector512<float> x) =>
        Vector512<float>.One - (Vector512.Create(2f) / (Exp2(Avx512F.Min(Vector512.Create(127f), x * (2 * Log2E))) + Vector512<float>.One));

    /// <summary>2^x of one number.</summary>
    public static float Exp2(float x) => Exp2(Vector512.Create(x)).ToScalar();

    /// <summary>16 bfloat16 numbers as float32.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<float> Load(ushort* source) => (Avx512F.ConvertToVector512UInt32(Vector256.Load(source)) << 16).AsSingle();

    /// <summary>Rounded to the nearest bfloat16, to even at a tie: the bits, in the low half of each word.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<uint> Rounded(Vector512<float> x)
    {
        var bits = x.AsUInt32();
        return (bits + Vector512.Create(0x7FFFu) + ((bits >> 16) & Vector512<uint>.One)) >> 16;
    }

    /// <summary>The same, a tie away from zero: for numbers inside a kernel, where ties are rare and every instruction counts.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector512<uint> RoundedFast(Vector512<float> x) => (x.AsUInt32() + Vector512.Create(0x8000u)) >> 16;

    /// <summary>16 numbers rounded to bfloat16 that way.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void StoreFast(Vector512<float> x, ushort* target) => Avx512F.ConvertToVector256UInt16(RoundedFast(x)).Store(target);

    /// <summary>16 numbers rounded to bfloat16.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(Vector512<float> x, ushort* target) => Avx512F.ConvertToVector256UInt16(Rounded(x)).Store(target);
}
