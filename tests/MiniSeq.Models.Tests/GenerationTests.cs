using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Tests;

public sealed class GenerationTests
{
    private static CausalLM Model()
    {
        random.manual_seed(8);
        return new CausalLM(DecoderTests.Tiny() with { EosTokenIds = [30] });
    }

    // Without a cache: the whole text again for every token.
    private static int[] Slow(CausalLM model, int[] prompt, int count)
    {
        var text = prompt.ToList();
        while (text.Count < prompt.Length + count)
        {
            using var scope = NewDisposeScope();
            var logits = model.call(tensor((long[])[.. text.Select(t => (long)t)]).unsqueeze(0));
            int next = (int)logits[0, -1].argmax().item<long>();
            if (model.Config.EosTokenIds.Contains(next)) break;
            text.Add(next);
        }
        return [.. text.Skip(prompt.Length)];
    }

    [Fact]
    public void GreedyWithCacheAndBatchEqualsGreedyWithout()
    {
        using var model = Model();
        int[][] prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]];
        var together = model.Generate(prompts, new GenerationOptions { MaxNewTokens = 12 });
        for (int i = 0; i < prompts.Length; i++) Assert.Equal(Slow(model, prompts[i], 12), together[i]);
    }

    [Fact]
    public void EndOfSequenceStopsOneTextAndNotTheOthers()
    {
        using var model = Model();
        int[][] prompts = [[1, 2, 3], [4, 9]];
        var free = model.Generate(prompts, new GenerationOptions { MaxNewTokens = 10, EosTokenIds = [] });
        int stop = free[0][4];
        var stopped = model.Generate(prompts, new GenerationOptions { MaxNewTokens = 10, EosTokenIds = [stop] });
        for (int i = 0; i < 2; i++)
            Assert.Equal(free[i].TakeWhile(t => t != stop), stopped[i]);
    }

    [Fact]
    public void ASeedGivesTheSameDrawsAndAnotherSeedOthers()
    {
        using var model = Model();
        int[] Draw(int seed, int topK = 0, double topP = 1) =>
            model.Generate([[1, 2]], new GenerationOptions { MaxNewTokens = 30, DoSample = true, Temperature = 2, Seed = seed, TopK = topK, TopP = topP, EosTokenIds = [] })[0];
        Assert.Equal(Draw(1), Draw(1));
        Assert.NotEqual(Draw(1), Draw(2));
        var greedy = model.Generate([[1, 2]], new GenerationOptions { MaxNewTokens = 30, EosTokenIds = [] })[0];
        Assert.Equal(greedy, Draw(3, topK: 1));
        Assert.Equal(greedy, Draw(4, topP: 1e-9));
    }

    [Fact]
    public void WrongOptionsAndPromptsAreNamed()
    {
        using var model = Model();
        Assert.Contains("Prompt 1", Assert.Throws<ArgumentException>(() => model.Generate([[1], []])).Message);
        Assert.Contains("Token id 99", Assert.Throws<ArgumentException>(() => model.Generate([[99]])).Message);
        Assert.Contains("Temperature", Assert.Throws<ArgumentException>(() => model.Generate([[1]], new GenerationOptions { DoSample = true, Temperature = 0 })).Message);
        Assert.Contains("TopP", Assert.Throws<ArgumentException>(() => model.Generate([[1]], new GenerationOptions { TopP = 0 })).Message);
        Assert.Empty(model.Generate([[1]], new GenerationOptions { MaxNewTokens = 0 })[0]);
        Assert.Throws<OperationCanceledException>(() => model.Generate([[1]], cancellationToken: new CancellationToken(true)));
    }

    [Fact]
    public void TokensAreToldAsTheyAreChosenAndNothingLeaks()
    {
        using var model = Model();
        var options = new GenerationOptions { MaxNewTokens = 8, EosTokenIds = [] };
        model.Generate([[1, 2], [3]], options);
        long tensors = Tensor.TotalCount;
        var told = new List<(int, int)>();
        var result = model.Generate([[1, 2], [3]], options, (i, t) => told.Add((i, t)));
        Assert.Equal(result[1], told.Where(t => t.Item1 == 1).Select(t => t.Item2));
        Assert.Equal(tensors, Tensor.TotalCount);
    }
}
