// A Worker made of a hidden frame: browsers refuse workers on pages opened from a folder (file:), and the search is one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const start = "postMessage = data => parent.postMessage(data, '*');" +
        "importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise((done, failed) => {" +
        "const script = document.createElement('script'); script.src = src; script.onload = done; script.onerror = failed;" +
        "document.body.append(script); })), Promise.resolve());";
      this.frame.srcdoc = `<body><script>${start}</scr` + `ipt><script src="${new URL(url, location)}"></scr` + "ipt></body>";
      this.ready = new Promise(done => { this.frame.onload = done; });
      window.addEventListener("message", event => {
        if (event.source !== this.frame.contentWindow) return;
        const message = new MessageEvent("message", {data: event.data});
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      document.body.append(this.frame);
    }
    postMessage(data) {
      const send = frame => frame.dispatchEvent(new frame.MessageEvent("message", {data}));
      this.ready.then(() => send(this.frame.contentWindow));
    }
    terminate() { this.frame.remove(); }
  };
}
