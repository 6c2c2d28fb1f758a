"""The look of a page: one style sheet and one small script, both inline, light and dark."""

# Colors of lines have a contrast of at least 4.5 to the page in either mode.
CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#536071;--line:#d9dee5;
--accent:#0b5cad;--good:#12693a;--good-bg:#e3f4ea;--watch:#8a4b00;--watch-bg:#fdf0d9;--problem:#a61b1b;
--problem-bg:#fde8e8;--note:#475467;--note-bg:#eceff3;
--s0:#0b5cad;--s1:#b3400b;--s2:#0f766e;--s3:#7a2fbf;--s4:#8a6100;--s5:#b0185e;--s6:#475467;--s7:#2d7a1f}
@media (prefers-color-scheme:dark){:root{--page:#11161d;--card:#1a212b;--ink:#e8edf3;--soft:#a3b0c0;
--line:#323d4b;--accent:#7db8ff;--good:#7fdba6;--good-bg:#143524;--watch:#f5c26b;--watch-bg:#3a2a0d;
--problem:#ff9d9d;--problem-bg:#451a1a;--note:#b6c2d0;--note-bg:#27313d;
--s0:#7db8ff;--s1:#ff9d6e;--s2:#5fd4c7;--s3:#cda4ff;--s4:#e9c46a;--s5:#ff93c1;--s6:#b6c2d0;--s7:#93d97f}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:4rem}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 -apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
header,main,footer,nav ul{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.75rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 4px;line-height:1.3}
h3{font-size:.95rem;margin:0 0 6px;line-height:1.35}
p{margin:.4em 0;max-width:75ch}
a{color:var(--accent)}
.lead{color:var(--soft);margin:2px 0 14px;max-width:none}
nav{position:sticky;top:0;background:var(--page);border-bottom:1px solid var(--line);z-index:2;margin-top:16px}
nav ul{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;padding-top:9px;padding-bottom:9px}
nav a{text-decoration:none;font-size:.9rem}
nav a:hover,nav a:focus{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:18px 0}
.banner{display:flex;gap:14px;align-items:flex-start;border-radius:10px;padding:14px 18px;margin:14px 0 0}
.banner p{margin:0}
.banner.good{background:var(--good-bg)}.banner.watch{background:var(--watch-bg)}
.banner.problem{background:var(--problem-bg)}.banner.note{background:var(--note-bg)}
.pill{display:inline-flex;align-items:center;gap:.4em;border-radius:99px;padding:1px 10px;font-size:.82rem;
font-weight:600;white-space:nowrap}
.pill.good{color:var(--good);background:var(--good-bg)}.pill.watch{color:var(--watch);background:var(--watch-bg)}
.pill.problem{color:var(--problem);background:var(--problem-bg)}.pill.note{color:var(--note);background:var(--note-bg)}
.banner .pill{background:var(--card);margin-top:1px}
progress{width:100%;height:8px;accent-color:var(--accent);display:block;margin:14px 0 0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px 22px;margin:16px 0 0}
.facts div{min-width:0}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere;font-size:.93rem}
.health{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px;margin-top:14px}
.health article{border:1px solid var(--line);border-radius:8px;padding:12px 14px;display:flex;flex-direction:column}
.health .top{display:flex;justify-content:space-between;gap:8px;align-items:center}
.health .value{display:flex;justify-content:space-between;align-items:center;gap:10px;font-size:1.5rem;
font-weight:600;font-variant-numeric:tabular-nums;margin:2px 0}
.health p{font-size:.88rem;color:var(--soft);margin:0}
.spark{width:96px;height:30px;flex:none}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:22px 24px;margin-top:14px}
figure{margin:0;min-width:0}
figcaption{font-size:.83rem;color:var(--soft)}
.chart{position:relative}
.chart>svg,.dots{width:100%;height:auto;display:block;touch-action:pan-y}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:8px 30px}
.dots{max-width:460px}
.chart h3{display:flex;justify-content:space-between;gap:10px}
.chart h3 b{font-variant-numeric:tabular-nums}
svg text{fill:var(--soft);font-size:11.5px;font-family:inherit}
svg text.label{fill:var(--ink);font-size:12px}svg text.strong{font-weight:700}
.grid{stroke:var(--line);stroke-width:1}
.level{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:1 3}
.cursor{stroke:var(--soft);stroke-width:1}
polyline,.sample line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.interval{stroke-width:7;stroke-linecap:round;opacity:.35;stroke:var(--s6)}.interval.strong{stroke:var(--s0)}
.dot{fill:var(--s6)}.dot.strong{fill:var(--s0)}
.legend{list-style:none;margin:2px 0 0;padding:0 0 0 6px;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.83rem}
.legend li{display:flex;align-items:center;gap:6px;min-width:0}
.legend span{overflow-wrap:anywhere}.legend b{font-variant-numeric:tabular-nums}
.sample{width:28px;height:10px;flex:none}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;margin:12px 0 4px}
caption{text-align:left;color:var(--soft);font-size:.83rem;padding-bottom:4px}
th,td{text-align:left;padding:5px 16px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.text{overflow-wrap:anywhere;min-width:7rem}
th{font-weight:600}
tr.strong td,tr.strong th{font-weight:700}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.85rem}
code{overflow-wrap:anywhere}
th code{white-space:nowrap}
pre{background:var(--page);border:1px solid var(--line);border-radius:6px;padding:10px 12px;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
img{display:block;max-width:100%;height:auto;border-radius:4px;background:var(--note-bg)}
img.pixels{image-rendering:pixelated}
.views{display:grid;gap:8px 10px;margin-top:12px}
.views figcaption{margin-top:2px;line-height:1.3}
.views img{width:100%}
.views .corner{display:none}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:6px;margin:6px 0 0}
.strip img{width:100%;aspect-ratio:1;object-fit:cover}
.strip figcaption{font-size:.75rem;line-height:1.25;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.strip .query{position:relative}
.strip .query img{outline:3px solid var(--accent);outline-offset:-3px}
.group{margin:14px 0 0}
.zoom{overflow:auto;max-height:85vh;border-radius:6px;margin-top:8px}
.zoom img{width:100%;max-width:none;border-radius:0}
#bigger:checked~.zoom img{width:250%}
#bigger{margin:12px 6px 0 0;width:1.1em;height:1.1em;vertical-align:-2px}
details summary{cursor:pointer;font-weight:600;padding:6px 0}
.settings{columns:2;column-gap:40px}
.settings div{break-inside:avoid;display:flex;justify-content:space-between;gap:14px;border-bottom:1px solid var(--line);
padding:2px 0;font-size:.84rem}
.settings code:last-child{text-align:right}
footer{color:var(--soft);font-size:.83rem;padding-top:4px;padding-bottom:40px}
.tip{position:absolute;pointer-events:none;background:var(--ink);color:var(--card);border-radius:5px;padding:4px 8px;
font-size:.78rem;line-height:1.35;white-space:nowrap;z-index:3;top:34px}
a:focus-visible,summary:focus-visible,input:focus-visible,.scroll:focus-visible,.zoom:focus-visible{
outline:2px solid var(--accent);outline-offset:2px}
@media (max-width:640px){
header,main,footer,nav ul{padding-left:14px;padding-right:14px}
nav{position:static}
section{padding:16px 14px}.settings{columns:1}h1{font-size:1.4rem}
.views{grid-template-columns:repeat(2,1fr)!important}
.strip{grid-template-columns:repeat(4,1fr)}
th,td{padding-right:12px}}
@media print{nav{display:none}section{break-inside:avoid}}
"""

# Numbers under the pointer, at the same epoch in all charts; the page says all the rest without it.
SCRIPT = """
(()=>{const L=44,R=12,W=380,charts=[...document.querySelectorAll('.chart[data-chart]')].map(f=>({f,
d:JSON.parse(f.dataset.chart),svg:f.querySelector('svg'),cursor:f.querySelector('.cursor')}));
const near=(points,x)=>points.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a);
const place=(c,x)=>L+(W-L-R)*Math.min(Math.max((x-c.d.x[0])/((c.d.x[1]-c.d.x[0])||1),0),1);
let tip=null;
const mark=(c,x)=>{c.cursor.setAttribute('x1',x);c.cursor.setAttribute('x2',x)};
const clear=()=>{if(tip)tip.remove();tip=null;for(const c of charts)mark(c,-9)};
for(const c of charts){c.svg.addEventListener('pointermove',e=>{const b=c.svg.getBoundingClientRect();
const at=((e.clientX-b.left)/b.width*W-L)/(W-L-R),x=c.d.x[0]+Math.min(Math.max(at,0),1)*(c.d.x[1]-c.d.x[0]);clear();
for(const o of charts)mark(o,place(o,x));
tip=document.createElement('div');tip.className='tip';
for(const text of ['epoch '+(+x.toFixed(2)),...c.d.lines.map(l=>l.label+': '+near(l.points,x)[1]+c.d.unit)]){
const row=document.createElement('div');row.textContent=text;tip.append(row)}
c.f.append(tip);const left=e.clientX-b.left,width=tip.offsetWidth;
tip.style.left=Math.max(Math.min(left+14,b.width-width),0)+'px'});
c.svg.addEventListener('pointerleave',clear)}
})();
"""

COLORS = "".join(
    f"polyline.s{n},.sample .s{n}{{stroke:var(--s{n})}}circle.s{n}{{fill:var(--s{n})}}"
    for n in range(8)
)


def document(title: str, body: str) -> str:
    """Return a whole page; `title` is escaped HTML, `body` HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{CSS}{COLORS}</style></head>\n"
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )
