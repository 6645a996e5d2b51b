namespace MiniSeq.Models;

/// <summary>The error of an option outside its range.</summary>
internal static class OptionRange
{
    /// <exception cref="ArgumentOutOfRangeException">It does not hold: names the option, its value and its range.</exception>
    public static void Check(bool holds, string name, object? value, string range)
    {
        if (!holds) throw new ArgumentOutOfRangeException(name, value, $"{name} must be {range}.");
    }
}
