using System.Globalization;
using System.Text;

namespace MiniSeq.Models;

/// <summary>Unicode normalization form C (Unicode Standard Annex 15), with tables of its own.</summary>
/// <remarks><see cref="string.Normalize()"/> returns its input unchanged, and says nothing, in applications that set
/// <c>InvariantGlobalization</c>; the token ids of a model must not depend on that switch.</remarks>
internal static class Nfc
{
    private const int FirstDecomposed = 0xC0;
    private const int FirstAffected = 0x300; // every character before the combining marks is in form C
    private const int Syllables = 0xAC00, Leads = 0x1100, Vowels = 0x1161, Trails = 0x11A7;
    private const int SyllableCount = 11172, LeadCount = 19, VowelCount = 21, TrailCount = 28;
    private static readonly Lazy<Tables> s_tables = new(Tables.Load);

    /// <summary>The text in form C; the same string where nothing could change.</summary>
    public static string Normalize(string text)
    {
        if (text.AsSpan().IndexOfAnyInRange((char)FirstAffected, char.MaxValue) < 0)
            return text;
        var tables = s_tables.Value;
        var runes = new List<int>(text.Length);
        foreach (var rune in text.EnumerateRunes())
            Decompose(rune.Value, tables, runes);
        Reorder(runes, tables);
        Compose(runes, tables);
        var result = new StringBuilder(text.Length);
        Span<char> pair = stackalloc char[2];
        foreach (var rune in runes)
            result.Append(pair[..new Rune(rune).EncodeToUtf16(pair)]);
        return result.ToString();
    }

    private static void Decompose(int rune, Tables tables, List<int> runes)
    {
        if (rune >= FirstDecomposed && tables.Parts.TryGetValue(rune, out var parts))
            foreach (var part in parts)
                Decompose(part, tables, runes);
        else if ((uint)(rune - Syllables) < SyllableCount)
        {
            var (syllable, trail) = Math.DivRem(rune - Syllables, TrailCount);
            runes.Add(Leads + syllable / VowelCount);
            runes.Add(Vowels + syllable % VowelCount);
            if (trail > 0)
                runes.Add(Trails + trail);
        }
        else
            runes.Add(rune);
    }

    /// <summary>Sorts each run of combining marks by its class, keeping the order of equals.</summary>
    private static void Reorder(List<int> runes, Tables tables)
    {
        for (var begin = 0; begin < runes.Count; begin++)
        {
            var end = begin;
            while (end < runes.Count && tables.Class(runes[end]) > 0)
                end++;
            if (end - begin > 1)
            {
                var sorted = runes[begin..end].OrderBy(tables.Class).ToArray();
                for (var i = 0; i < sorted.Length; i++)
                    runes[begin + i] = sorted[i];
            }
            begin = end;
        }
    }

    private static void Compose(List<int> runes, Tables tables)
    {
        var starter = -1; // where the last starter went
        var previous = 0; // class of the last rune kept after it
        var count = 0;
        for (var i = 0; i < runes.Count; i++)
        {
            var rune = runes[i];
            var order = tables.Class(rune);
            var adjacent = starter == count - 1;
            if (starter >= 0 && (adjacent || previous < order) && Pair(runes[starter], rune, tables) is { } composed)
            {
                runes[starter] = composed;
                continue;
            }
            if (order == 0)
                starter = count;
            previous = order;
            runes[count++] = rune;
        }
        runes.RemoveRange(count, runes.Count - count);
    }

    private static int? Pair(int first, int second, Tables tables)
    {
        if ((uint)(first - Leads) < LeadCount && (uint)(second - Vowels) < VowelCount)
            return Syllables + ((first - Leads) * VowelCount + second - Vowels) * TrailCount;
        if ((uint)(first - Syllables) < SyllableCount && (first - Syllables) % TrailCount == 0 && second - Trails is > 0 and < TrailCount)
            return first + second - Trails;
        return tables.Composites.TryGetValue((first, second), out var composed) ? composed : null;
    }

    private sealed record Tables(Dictionary<int, int[]> Parts, Dictionary<(int, int), int> Composites, Dictionary<int, int> Classes)
    {
        public int Class(int rune) => rune < FirstAffected ? 0 : Classes.GetValueOrDefault(rune);

        public static Tables Load()
        {
            var tables = new Tables([], [], []);
            using var stream = typeof(Nfc).Assembly.GetManifestResourceStream("MiniSeq.Models.Nfc.txt")!;
            using var lines = new StreamReader(stream);
            while (lines.ReadLine() is { } line)
                if (!line.StartsWith('#'))
                    tables.Add(line);
            return tables;
        }

        private void Add(string line)
        {
            var at = line.IndexOfAny(['=', '>', '-']);
            var code = Hex(line[..at]);
            if (line[at] == '-')
            {
                var colon = line.IndexOf(':');
                for (var last = Hex(line[(at + 1)..colon]); code <= last; code++)
                    Classes.Add(code, int.Parse(line.AsSpan(colon + 1), CultureInfo.InvariantCulture));
                return;
            }
            int[] parts = [.. line[(at + 1)..].Split(' ').Select(Hex)];
            Parts.Add(code, parts);
            if (line[at] == '=')
                Composites.Add((parts[0], parts[1]), code);
        }

        private static int Hex(string digits) => int.Parse(digits, NumberStyles.HexNumber, CultureInfo.InvariantCulture);
    }
}
